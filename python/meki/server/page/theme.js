// Runs before the page is drawn: no flash of the other theme.
"use strict";
{
  try {
    const chosen = localStorage.getItem("theme");
    if (chosen) document.documentElement.dataset.theme = chosen;
  } catch {
    // Site data is blocked: the theme is the system's.
  }
}
