"""All that the package does on one real data set, in a minute: ``python -m pyro_elbo_ext demo``."""

from pyro_elbo_ext.demo.eight_schools import centered, load_eight_schools, log_evidence, noncentered
from pyro_elbo_ext.demo.story import Demo, Speed, run_demo

__all__ = ["Demo", "Speed", "centered", "load_eight_schools", "log_evidence", "noncentered", "run_demo"]
