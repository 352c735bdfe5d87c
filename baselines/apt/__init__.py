"""APT (arXiv:2401.12200), one module per topic. Records name `baselines.apt.Apt`, so it is re-exported here."""

from baselines.apt.method import Apt

__all__ = ["Apt"]
