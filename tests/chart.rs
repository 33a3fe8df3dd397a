//! The chart's configurations are the program's: what it renders loads.

use std::fs;
use std::path::Path;

use session_broker::config::Config;

#[test]
fn every_configuration_that_the_chart_renders_loads() {
    const KEY_FILE: &str = "commit_token_key_file = ";

    let directory = tempfile::tempdir().unwrap();
    let (file, key) = (directory.path().join("broker.toml"), directory.path().join("key"));
    fs::write(&key, "0".repeat(64)).unwrap();
    let mut loaded = 0;
    for entry in fs::read_dir("helm/golden").unwrap() {
        let render = entry.unwrap().path();
        let is_render = render.extension().is_some_and(|extension| extension == "yaml");
        if !is_render || render.to_string_lossy().ends_with(".values.yaml") {
            continue;
        }
        // The only file that is read before it is needed.
        let key = format!("{KEY_FILE}\"{}\"", key.display());
        let text = configuration(&render);
        let lines = text.lines().map(|line| if line.starts_with(KEY_FILE) { key.as_str() } else { line });
        fs::write(&file, lines.collect::<Vec<_>>().join("\n")).unwrap();
        let config =
            Config::load(Some(&file), []).unwrap_or_else(|problems| panic!("{}: {problems}", render.display()));
        assert!(config.operations.is_some(), "{}", render.display());
        loaded += 1;
    }
    assert!(loaded >= 12, "{loaded} renders");
}

/// `broker.toml` as a render has it, in a ConfigMap.
fn configuration(render: &Path) -> String {
    const INDENT: &str = "    ";

    let text = fs::read_to_string(render).unwrap();
    let lines = text.lines().skip_while(|line| line.trim() != "broker.toml: |").skip(1);
    let lines = lines.take_while(|line| line.is_empty() || line.starts_with(INDENT));
    lines.map(|line| line.strip_prefix(INDENT).unwrap_or(line)).collect::<Vec<_>>().join("\n")
}
