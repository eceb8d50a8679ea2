"""Programs around gapjax: flags to plain arguments, files and pages."""
