"""Numbers that a page may have typed, as regular expressions by the reason why; `page.md: ` before one says where alone."""

CONSTANTS = {
    "years, of papers, programs and processors": [r"\b(19|20)\d\d\b"],
}
