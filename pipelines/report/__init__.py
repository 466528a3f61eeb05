"""The report of a run: one self-contained HTML page for people, one JSON document for machines."""

from pipelines.report.page import render_html, render_json

__all__ = ["render_html", "render_json"]
