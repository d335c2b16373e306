// Tables of class "sortable": a click on the head of a column sorts its rows, largest number or first name on top; the
// next click turns them round, the third gives the page's own order back. Rows without a number stay below.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...table.tBodies[0].rows];
  const numeric = column => rows.some(row => "number" in row.cells[column].dataset);
  heads.forEach((head, column) => {
    if (column > 0 && !numeric(column)) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const orders = column > 0 ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
    button.addEventListener("click", () => {
      const order = orders[(orders.indexOf(head.getAttribute("aria-sort") ?? "none") + 1) % 3];
      heads.forEach(other => other.removeAttribute("aria-sort"));
      let sorted = rows;
      if (order !== "none") {
        head.setAttribute("aria-sort", order);
        const turn = order === "ascending" ? 1 : -1;
        const absent = row => column > 0 && !("number" in row.cells[column].dataset);
        const compare = column > 0
          ? (a, b) => a.cells[column].dataset.number - b.cells[column].dataset.number
          : (a, b) => a.cells[0].textContent.localeCompare(b.cells[0].textContent, "en", { numeric: true });
        const known = rows.filter(row => !absent(row)).sort((a, b) => turn * compare(a, b));
        sorted = [...known, ...rows.filter(absent)];
      }
      table.tBodies[0].append(...sorted);
    });
  });
}
