// Light, dark, or as the system has it. Loaded before the page is painted (no module), so that nothing flashes.
// Any button with `data-theme-toggle` goes through the three.

(() => {
  const NAMES = { auto: "Theme: as the system", light: "Theme: light", dark: "Theme: dark" };
  const order = Object.keys(NAMES);
  const root = document.documentElement;

  function kept() {
    try {
      const theme = localStorage.getItem("ratchet-theme");
      return order.includes(theme) ? theme : "auto";
    } catch {
      return "auto";   // a browser that keeps nothing
    }
  }

  function show(theme) {
    root.dataset.theme = theme;
    for (const button of document.querySelectorAll("[data-theme-toggle]")) button.textContent = NAMES[theme];
  }

  show(kept());
  document.addEventListener("DOMContentLoaded", () => {
    show(root.dataset.theme);
    for (const button of document.querySelectorAll("[data-theme-toggle]")) {
      button.addEventListener("click", () => {
        const next = order[(order.indexOf(root.dataset.theme) + 1) % order.length];
        try { localStorage.setItem("ratchet-theme", next); } catch { /* this page only */ }
        show(next);
      });
    }
  });
})();
