"""What `entropy_po.tiles` calls: fold_, grad_ and stats_ on Triton, and the launch choice behind them."""

from entropy_po.kernels.config import LaunchConfig, launch_config
from entropy_po.kernels.fold import fold_
from entropy_po.kernels.grad import grad_
from entropy_po.kernels.stats import stats_

__all__ = ["LaunchConfig", "fold_", "grad_", "launch_config", "stats_"]
