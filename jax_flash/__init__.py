"""Exact attention at the speed of the chip, for JAX."""

from jax_flash import fp8 as fp8
from jax_flash.attention import dot_product_attention as dot_product_attention
from jax_flash.attention import explain as explain
from jax_flash.attention import flash_attention as flash_attention
from jax_flash.attention import quantized_attention as quantized_attention
from jax_flash.custom_call import SAVE_NAMES as SAVE_NAMES
from jax_flash.spec import Fp8 as Fp8
