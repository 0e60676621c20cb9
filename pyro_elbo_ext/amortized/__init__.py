"""Models with a latent for each datum, whose distribution a network gives: VAEs and the like."""

from pyro_elbo_ext.amortized.gap import AmortizationGap, amortization_gap
from pyro_elbo_ext.amortized.latent_units import ActiveUnits, active_units
from pyro_elbo_ext.amortized.surgery import ElboSurgery, elbo_surgery

__all__ = ["ActiveUnits", "AmortizationGap", "ElboSurgery", "active_units", "amortization_gap", "elbo_surgery"]
