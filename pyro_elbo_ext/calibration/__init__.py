"""Are a guide and its training calibrated, over data that the model simulates?"""

from pyro_elbo_ext.calibration.calibrate import simulate_calibration
from pyro_elbo_ext.calibration.calibration import Calibration
from pyro_elbo_ext.calibration.recipes import TrainGuide

__all__ = ["Calibration", "TrainGuide", "simulate_calibration"]
