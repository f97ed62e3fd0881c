"""From report.json to page, tables and figures."""
