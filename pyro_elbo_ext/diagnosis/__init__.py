"""Is the fit good, in what respect not, and what to do about it."""

from pyro_elbo_ext.diagnosis.diagnosis import Diagnosis
from pyro_elbo_ext.diagnosis.findings import Finding
from pyro_elbo_ext.diagnosis.linear_response import LinearResponse, linear_response
from pyro_elbo_ext.diagnosis.verdict import diagnose

__all__ = ["Diagnosis", "Finding", "LinearResponse", "diagnose", "linear_response"]
