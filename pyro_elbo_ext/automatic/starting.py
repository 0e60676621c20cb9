"""A first Gaussian."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

from pyro_elbo_ext.automatic.evaluations import Array, Evaluations
from pyro_elbo_ext.automatic.gaussian import Gaussian

def lbfgs(evaluate: Evaluations, x0: Array):
    def negative(x):
        v, g = evaluate(x[None])
        return (-v[0] if np.isfinite(v[0]) else 1e300), -g[0]
    return minimize(negative, x0, jac=True, method="L-BFGS-B", options={"maxiter": 200, "ftol":1e-8,"maxcor":20})

def laplace(evaluate, x, h=1e-4):
    d=len(x)
    step = h*np.eye(d)
    _, g = evaluate(np.concatenate([x+step,x-step]))
    H = -(g[:d]-g[d:])/(2*h)
    H=(H+H.T)/2
    scale = 1/np.sqrt(np.abs(np.diag(H)).clip(1e-8))
    w,V=np.linalg.eigh(H*scale*scale[:,None])
    w=np.abs(w).clip(1e-3)
    return Gaussian(x, scale[:,None]*V*w**-.5)
