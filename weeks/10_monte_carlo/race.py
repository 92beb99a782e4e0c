"""Which No-U-Turn Sampler gets most effective draws out of a second: ours, NumPyro's or BlackJAX's?

All sample the same flat log-density, with 1000 steps of warm-up and a diagonal metric, one chain on
each of two devices. Each is one compiled program; a run is timed from its key to its last draw,
warm-up included, and divided into the bulk effective sample size of its worst coordinate. All run
once in every round, with the round's key. The compiler's settings are the same for all.

NumPyro is given its best: its potential is our flat function, its chains run on devices of their
own or in lock-step, whichever is faster on the target, and its program is compiled once, which its
own `run` would do anew each time. Three targets are raced once more without the setting that
compiles small loops to one function, in a process of their own, to see what it is worth.

Expected: nothing; a speed is measured. The goals are those that this repository set itself.

Paper   effective sample size: Vehtari et al. 2021, arXiv:1903.08008
Run     uv run python weeks/10_monte_carlo/race.py
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median, quantiles

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from numpyro.infer import MCMC, NUTS
from tqdm import tqdm

from implementations.bayesian.chains import run_chains, spread
from implementations.bayesian.diagnostics import entrywise, ess_bulk
from implementations.bayesian.targets import TARGETS, Target
from implementations.lab.findings import Finding, at_least
from implementations.lab.host_devices import use_host_devices
from implementations.lab.script import run
from implementations.lab.timing import time_interleaved

CHAINS = 2
NUMPYRO = ("NumPyro", "NumPyro, lock-step")
PAIRS = (("ours", "NumPyro", 1.25), ("ours, Fisher", "NumPyro", 1.3), ("ours", "BlackJAX", 1.0))
"""who is compared with whom, and the ratio hoped for"""
FIELD = (
    "standard_normal",
    "correlated_normal",
    "funnel_non_centred",
    "banana",
    "eight_schools_non_centred",
    "tumours",
    "cars",
    "volatility",
)
"""targets on which an effective sample size means something: no funnel that nobody can enter"""


@dataclass(frozen=True)
class Config:
    """Race samplers over targets."""

    targets: tuple[str, ...] = FIELD
    warm_up: int = 1000
    draws: int = 1000
    samplers: tuple[str, ...] = ("ours", "ours, Fisher", *NUMPYRO, "BlackJAX")
    """who takes part"""
    rounds: int = 7
    """timed runs of each sampler on each target, each with a key of its own"""
    one_function_loops: bool = True
    """compile small loops to one function, for all samplers (host_devices.py)"""
    without: tuple[str, ...] = ("standard_normal", "eight_schools_non_centred", "volatility")
    """targets on which a process of its own also races without that setting"""


Program = Callable[[jax.Array], jax.Array]
"""from a key to positions [chain, draw, dim]"""


def ours(target: Target, config: Config, metric: str) -> Program:
    start = jnp.full((CHAINS, target.dimension), 0.1)
    settings = {"warm_up": config.warm_up, "draws": config.draws, "metric": metric}
    return lambda key: run_chains(key, start, target.log_density, **settings).position


def numpyro_chain(key, target: Target, config: Config, chains: int = 1):
    kernel = NUTS(potential_fn=lambda position: -target.log_density(position))
    method = "vectorized" if chains > 1 else "sequential"
    sampler = MCMC(
        kernel,
        num_warmup=config.warm_up,
        num_samples=config.draws,
        num_chains=chains,
        chain_method=method,
        progress_bar=False,
    )
    shape = (chains, target.dimension) if chains > 1 else (target.dimension,)
    sampler.run(key, init_params=jnp.full(shape, 0.1))
    return sampler.get_samples(group_by_chain=chains > 1)


def blackjax_chain(key, target: Target, config: Config):
    import blackjax  # not above: its import uses JAX, after which devices cannot be asked for

    warm_key, draw_key = jax.random.split(key)
    adaptation = blackjax.window_adaptation(blackjax.nuts, target.log_density)
    (state, tuned), _ = adaptation.run(
        warm_key, jnp.full(target.dimension, 0.1), num_steps=config.warm_up
    )
    step = blackjax.nuts(target.log_density, **tuned).step

    def draw(state, key):
        state, _ = step(key, state)
        return state, state.position

    return jax.lax.scan(draw, state, jax.random.split(draw_key, config.draws))[1]


def on_devices(chain: Callable) -> Program:
    """One chain a device."""
    each = spread(chain, CHAINS)
    return jax.jit(lambda key: each(jax.random.split(key, CHAINS)))


def programs(target: Target, config: Config) -> dict[str, Program]:
    """Everyone in the race, to be compiled at the first call."""
    given = {"target": target, "config": config}
    everyone = {
        "ours": ours(target, config, "diagonal"),
        "ours, Fisher": ours(target, config, "fisher"),
        "NumPyro": on_devices(partial(numpyro_chain, **given)),
        "NumPyro, lock-step": jax.jit(partial(numpyro_chain, **given, chains=CHAINS)),
        "BlackJAX": on_devices(partial(blackjax_chain, **given)),
    }
    return {name: everyone[name] for name in config.samplers}


class Runner:
    """A program that is called without arguments, with the next key; it keeps what it drew."""

    def __init__(self, program: Program):
        self.program, self.draws, started = program, [], time.perf_counter()
        jax.block_until_ready(program(jax.random.key(0)))
        self.first = time.perf_counter() - started

    def __call__(self) -> None:
        key = jax.random.key(1 + len(self.draws))
        self.draws.append(jax.block_until_ready(self.program(key)))

    def effective(self) -> list[float]:
        """The worst coordinate's bulk effective sample size, round by round."""
        rounds = (np.asarray(draws, float) for draws in self.draws)
        return [entrywise(ess_bulk, draws).min() for draws in rounds]


def race(target: Target, config: Config) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Effective draws a second of every sampler in every round, and seconds to compile it."""
    runners = {name: Runner(program) for name, program in programs(target, config).items()}
    timings = time_interleaved(runners, rounds=config.rounds, warmup=0)
    speeds, compiling = {}, {}
    for name, runner in runners.items():
        speeds[name] = np.array(runner.effective()) / timings.seconds[name]
        compiling[name] = runner.first - timings.median(name)
    both = [speeds.pop(name) for name in NUMPYRO if name in speeds]
    if both:
        speeds["NumPyro"] = max(both, key=median)
    return speeds, compiling


def main(config: Config) -> list[Finding]:
    use_host_devices(CHAINS, one_function_loops=config.one_function_loops)
    speeds, compiling = {}, []
    for name in tqdm(config.targets, unit="target"):
        speeds[name], seconds = race(TARGETS[name](), config)
        compiling.append(seconds)
    draw(speeds)
    findings = []
    for us, them, goal in PAIRS:
        if not {us, them} <= speeds[config.targets[0]].keys():
            continue
        ratios = {name: speed[us] / speed[them] for name, speed in speeds.items()}
        middle = {name: median(ratio) for name, ratio in ratios.items()}
        claim = f"{us}: effective draws a second over {them}'s, mean of {len(ratios)} targets"
        mean = geometric_mean(middle.values())
        findings.append(Finding(claim, mean, "x", goal=at_least(goal), seeds=config.rounds))
        for name, ratio in ratios.items():
            low, _, high = quantiles(ratio, n=4, method="inclusive")
            claim = f"{us} over {them}: {name}"
            noise = {"spread": (high - low) / 2, "seeds": config.rounds}
            findings.append(Finding(claim, middle[name], "x", **noise))
    if config.one_function_loops and config.without:
        findings += compare_settings(speeds, config)
    for name in speeds[config.targets[0]]:
        speed = geometric_mean(float(median(speed[name])) for speed in speeds.values())
        findings.append(Finding(f"{name}: effective draws a second, mean of targets", speed))
    for name in compiling[0]:
        seconds = median(seconds[name] for seconds in compiling)
        findings.append(Finding(f"{name}: time to compile, median target", seconds, "s"))
    return findings


def compare_settings(speeds: dict[str, dict[str, np.ndarray]], config: Config) -> list[Finding]:
    """The same race in a process that compiles loops as XLA does by default."""
    pair = ("ours", "NumPyro")
    options = ["--no-one-function-loops", "--samplers", *pair, "--targets", *config.without]
    options += ["--warm-up", config.warm_up, "--draws", config.draws, "--rounds", config.rounds]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *map(str, options), "--record", folder]
        plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=plain)
        record = json.loads((Path(folder) / "results" / "race.json").read_text())
    found = {entry["claim"]: entry["measured"] for entry in record["findings"]}
    ratio = found[
        f"ours: effective draws a second over NumPyro's, mean of {len(config.without)} targets"
    ]
    findings = [Finding("loops as XLA compiles them by default: ours over NumPyro", ratio, "x")]
    for name in pair:
        here = geometric_mean(float(median(speeds[target][name])) for target in config.without)
        there = found[f"{name}: effective draws a second, mean of targets"]
        claim = f"{name}: speed with loops as one function, over the default"
        findings.append(Finding(claim, here / there, "x"))
    return findings


def draw(speeds: dict[str, dict[str, np.ndarray]]) -> None:
    """A row of bars for each target, a mark for each round."""
    figure, axes = plt.subplots(figsize=(9, 0.75 * len(speeds) + 1.5), layout="constrained")
    samplers = list(next(iter(speeds.values())))
    for place, name in enumerate(samplers):
        height = np.arange(len(speeds)) + 0.2 * (place - 1.5)
        rounds = np.array([speed[name] for speed in speeds.values()])
        axes.barh(height, np.median(rounds, 1), 0.18, color=f"C{place}", alpha=0.6, label=name)
        axes.plot(rounds, np.repeat(height[:, None], rounds.shape[1], 1), "k|", markersize=4)
    axes.set_yticks(range(len(speeds)), [name.replace("_", " ") for name in speeds])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="effective draws a second, worst coordinate")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    axes.set_title("Warm-up and draws of two chains on two cores")
    del figure


if __name__ == "__main__":
    pair = ("ours", "NumPyro")
    quick = Config(("standard_normal",), warm_up=50, draws=50, samplers=pair, rounds=2, without=())
    run(main, Config(), quick=quick)
