"""The report: one standalone HTML file that says what a run did, what came of it, and what is not known."""

from rlhf_img.report.page import build

__all__ = ["build"]
