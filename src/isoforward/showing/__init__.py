"""Rows as people look at them: tables, pictures, exhibits, dashboards."""
