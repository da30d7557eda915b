"""jax_flash in Flax: a function for Flax's own attention modules, and modules that can do more (`.linen`, `.nnx`).

nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=jax_flash.flax.attention_fn)
nnx.MultiHeadAttention(8, 512, attention_fn=jax_flash.flax.attention_fn, rngs=rngs)
"""

from jax_flash.flax.functional import attention_fn, rotary

__all__ = ["attention_fn", "rotary"]
