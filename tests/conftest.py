"""Eight CPU devices for the tests of sharding, whatever else the machine has. Set before JAX starts."""

import os

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
