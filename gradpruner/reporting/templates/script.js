"use strict";
const table = document.getElementById("results");
if (table) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const status = document.getElementById("shown");
  const search = document.getElementById("search");
  const selects = [...document.querySelectorAll("select[data-column]")];
  let sorted = "";

  // A cell without a number comes last, however the others are sorted.
  const compare = (at, sign) => (first, second) => {
    const [a, b] = [first, second].map((row) => row.cells[at]);
    if (heads[at].dataset.kind !== "number") {
      return sign * a.textContent.trim().localeCompare(b.textContent.trim(), "en", { numeric: true });
    }
    if (!a.dataset.n || !b.dataset.n) return (a.dataset.n ? 0 : 1) - (b.dataset.n ? 0 : 1);
    return sign * (Number(a.dataset.n) - Number(b.dataset.n));
  };

  const say = () => {
    const count = rows.filter((row) => !row.hidden).length;
    status.textContent = `${count} of ${rows.length} rows${sorted}`;
  };

  heads.forEach((head, at) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const falls = head.getAttribute("aria-sort") === "none" ? head.dataset.first === "descending"
        : head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", falls ? "descending" : "ascending");
      rows.sort(compare(at, falls ? -1 : 1));
      body.append(...rows);
      sorted = `, sorted by ${button.textContent.trim()}, ${falls ? "descending" : "ascending"}`;
      say();
    });
  });

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word))
        || selects.some((select) => select.value
          && row.cells[Number(select.dataset.column)].dataset.v !== select.value);
    }
    say();
  };
  search.addEventListener("input", filter);
  selects.forEach((select) => select.addEventListener("change", filter));
  document.getElementById("reset").addEventListener("click", () => {
    search.value = "";
    selects.forEach((select) => { select.value = ""; });
    filter();
  });
  document.getElementById("filters").hidden = false;
  say();
}

// A link to a run opens its fold and those around it.
const reveal = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  target.scrollIntoView();
  if (target.tagName === "DETAILS") target.querySelector("summary").focus({ preventScroll: true });
};
window.addEventListener("hashchange", reveal);
reveal();

for (const button of document.querySelectorAll("button[data-open]")) {
  button.addEventListener("click", () => {
    const open = button.dataset.open === "true";
    document.querySelectorAll("#runs details.group").forEach((each) => { each.open = open; });
  });
}
