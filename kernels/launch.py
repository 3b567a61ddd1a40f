"""What `entropy_po.tiles` calls: fold_ and grad_ on Triton, and the launch choice behind them."""

from entropy_po.kernels.config import LaunchConfig, launch_config
from entropy_po.kernels.fold import fold_
from entropy_po.kernels.grad import grad_

__all__ = ["LaunchConfig", "fold_", "grad_", "launch_config"]
