"""Pages that need nothing but a browser: charts as SVG, pictures within, no script."""
