"""Let JAX see several CPU cores as devices, so that each can run a chain of its own.

JAX counts its devices once, at its first operation. So this is called first in a script's main();
importing JAX, or a module that does, may come before.

Run     uv run python implementations/lab/host_devices.py
"""

import jax


def use_host_devices(count: int = 2) -> None:
    """Have at least `count` CPU devices.

    Raises:
        ValueError: there would be no device, or JAX has counted fewer already.
    """
    if count < 1:
        raise ValueError(f"JAX needs at least one device, got {count}")
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
