"""The report of a run: one self-contained HTML page for people, one JSON document for machines."""

from pipelines.report.page import HTML_NAME, JSON_NAME, render_html, write_report

__all__ = ["HTML_NAME", "JSON_NAME", "render_html", "write_report"]
