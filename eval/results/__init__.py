"""Records of measurements, and what is made of them: statistics, tables, plots, data frames."""

from .records import budget_text, main_score, variant
from .store import read_records

__all__ = ["budget_text", "main_score", "read_records", "variant"]
