"""Figures as a reader wants them."""


def figure(value: float) -> str:
    """Three significant digits, without an exponent: 0.97, 1.06, 311, 457 000."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    digits = f"{value:.3g}"
    return f"{float(digits):,.0f}".replace(",", " ") if abs(value) >= 1000 else digits
