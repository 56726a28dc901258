"""Self-contained HTML pages: charts as SVG, embedded images, no scripts."""
