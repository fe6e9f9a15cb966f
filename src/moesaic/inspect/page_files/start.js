// The first view: the expert that the first finding is about, else the one with the sharpest preference.
buildMap();
buildViews();
paintMap();
const told = document.querySelector("[data-expert]");
choose(told ? Number(told.dataset.layer) : 0, told ? Number(told.dataset.expert) : 0);
for (const button of document.querySelectorAll("[data-expert]"))
  button.onclick = () => choose(Number(button.dataset.layer), Number(button.dataset.expert), true);
buildLayers();
buildSpending();
buildDifferences();
buildFlow();
buildText();
