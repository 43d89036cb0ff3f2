// Names for what the theme leaves without one, for readers who hear the page.
document.addEventListener("DOMContentLoaded", () => {
  // The arrows that unfold a part in the menu.
  for (const summary of document.querySelectorAll("nav.bd-links summary")) {
    const part = summary.closest("li").querySelector("a");
    summary.setAttribute("aria-label", `Pages of ${part.textContent.trim()}`);
  }
  // A list may hold only list items; the bibliography's entries call themselves others.
  for (const entry of document.querySelectorAll('.citation-list > [role="doc-biblioentry"]')) {
    entry.setAttribute("role", "listitem");
  }
});
