"""The connector with the sampler repaired: what the recipe names, for vLLM to load by name."""

import sampler_repair
from cpu_connector import CpuHiddenStatesConnector

__all__ = ["CpuHiddenStatesConnector"]

sampler_repair.install()
