"""Tuning of recipes by what was measured on the machine at hand."""
