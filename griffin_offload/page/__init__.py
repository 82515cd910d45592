"""A run as one HTML file that shows itself: no scripts, nothing from elsewhere.

- charts.py  numbers -> SVG
- page.py  a run's report, its memory over time, its answer -> the page
"""
