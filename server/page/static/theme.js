// Before the first paint: the theme that was chosen here, if one was.
document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "";
