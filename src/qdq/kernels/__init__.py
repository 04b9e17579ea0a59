"""Engines of one set of operations. ``reference`` is the definition; faster engines are bit-equal to it in fp32."""
