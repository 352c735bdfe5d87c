"""APT (arXiv:2401.12200) in its parts; records name the class that is re-exported here."""

from baselines.apt.method import Apt

__all__ = ["Apt"]
