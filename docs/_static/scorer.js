// How the search orders its results. The other values are those of Sphinx.
var Scorer = {
  // Pages about the project itself come last.
  score: ([page, title, anchor, description, score]) =>
    /^(changelog|contributing|design\/.*)$/.test(page) ? score - 1000 : score,
  objNameMatch: 11,
  // A part of a name, such as "ttl" in "unsettled", comes after each page with the word.
  objPartialMatch: 1,
  objPrio: { 0: 15, 1: 0, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
