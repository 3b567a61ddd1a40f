"""TRL on this library's operators: `accelerate_trl` for its own trainers, and H-DPO and QEMPO as subclasses of them.

The trainers reach into methods of TRL that are not its public interface, so versions that this was not tested with are
refused at import.
"""

from importlib.metadata import version

from packaging.version import Version

TESTED = (Version("1.15"), Version("1.17"))  # from, and up to but without


def check_version(installed: str) -> None:
    """Raises:
    ImportError: a version of TRL outside the tested range.
    """
    if not TESTED[0] <= Version(installed) < TESTED[1]:
        raise ImportError(
            f"trl {installed} is outside the range that entropy_po.integrations.trl is tested with, {TESTED[0]} up to "
            f"{TESTED[1]}; pip install 'trl>={TESTED[0]},<{TESTED[1]}'."
        )


check_version(version("trl"))

from entropy_po.integrations.trl.accelerate import (  # noqa: E402
    accelerate_trl,
    restore_trl,
    selective_log_softmax_and_entropy,
)
from entropy_po.integrations.trl.online import QEMPOGRPOConfig, QEMPOGRPOTrainer  # noqa: E402
from entropy_po.integrations.trl.preference import (  # noqa: E402
    HDPOConfig,
    HDPOTrainer,
    QEMPOConfig,
    QEMPOTrainer,
)

__all__ = [
    "HDPOConfig",
    "HDPOTrainer",
    "QEMPOConfig",
    "QEMPOGRPOConfig",
    "QEMPOGRPOTrainer",
    "QEMPOTrainer",
    "accelerate_trl",
    "restore_trl",
    "selective_log_softmax_and_entropy",
]
