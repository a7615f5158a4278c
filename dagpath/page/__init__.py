"""A report on a model as one page for a browser."""

from dagpath.page.page import html_report

__all__ = ["html_report"]
