"""Let JAX see several CPU cores as devices, so that each can run a chain of its own.

XLA, JAX's compiler, reads two settings once, at JAX's first operation. So this is called first in a
script's main(); importing JAX, or a module that does, may come before.

    devices   how many there are, of which each runs its program on a thread of its own
    loops     a loop that touches little memory becomes one machine function, instead of a list of
              small ones called in turn: a sampler's step then costs little but its arithmetic

Run     uv run python implementations/lab/host_devices.py
"""

import os

import jax

LOOPS = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1000000"
"""up to a megabyte; XLA's own limit is a kilobyte"""


def use_host_devices(count: int = 2, *, one_function_loops: bool = True) -> None:
    """Have at least `count` CPU devices, and small loops compiled to one function each.

    The second is a setting for speed alone: where JAX has already begun, it stays as it was.

    Raises:
        ValueError: there would be no device, or JAX has counted fewer already.
    """
    if count < 1:
        raise ValueError(f"JAX needs at least one device, got {count}")
    flags = os.environ.get("XLA_FLAGS", "")
    if one_function_loops and "xla_backend_extra_options" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {LOOPS}".strip()
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has begun: what it found must do
        if jax.local_device_count() < count:
            found = jax.local_device_count()
            raise ValueError(
                f"ask for {count} devices before JAX's first operation: it has found {found}"
            ) from None


def main() -> None:
    use_host_devices(2)
    print(*jax.local_devices(), sep="\n")


if __name__ == "__main__":
    main()
