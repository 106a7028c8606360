//! What users apply: the manifest, as kubectl, kustomize and Helm take it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use sluice_lab::control_plane;
use sluice_lab::kubelets::kubectl_command;

/// K2: the manifest for users has the rights that are tested elsewhere, and no more; and nothing in it is privileged.
#[test]
fn the_manifest_has_the_tested_rights_and_no_privileged_container() {
    let manifest = include_str!("../../deploy/sluice.yaml");
    let rights: String = include_str!("../../deploy/rbac.yaml")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| format!("{line}\n"))
        .collect();
    assert!(manifest.contains(&rights));
    assert!(!manifest.contains("privileged:"));
    assert_eq!(manifest.matches("readOnlyRootFilesystem: true").count(), 2);
}

/// K1 K2: as a kustomize base it is the same, and an overlay changes what it says alone.
#[test]
fn kustomize_takes_the_manifest_as_its_base() {
    let built = |folder: &str| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        let arguments = ["kustomize".to_owned(), folder.display().to_string()];
        let command = kubectl_command(&arguments).unwrap();
        let output = Command::new(&command[0]).args(&command[1..]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        documents(&String::from_utf8(output.stdout).unwrap())
    };
    let mut wanted = documents(include_str!("../../deploy/sluice.yaml"));
    assert_eq!(built("../deploy"), wanted);
    for (key, object) in &mut wanted {
        match key.as_str() {
            "ConfigMap/sluice" => {
                object["data"]["config.yaml"] = "datastore: { kind: kubernetes, kubernetes: { apiServer: \"https://192.0.2.1:6443\" } }\n\
                    clusterCIDRs: [10.42.0.0/16]\nserviceCIDRs: [10.43.0.0/16]"
                    .into();
            }
            "DaemonSet/sluice" => {
                let pod = &mut object["spec"]["template"]["spec"];
                for place in ["/initContainers/0/image", "/containers/0/image"] {
                    *pod.pointer_mut(place).unwrap() = "registry.example/sluice:0.1.0".into();
                }
            }
            _ => {}
        }
    }
    assert_eq!(built("manifests/overlay"), wanted);
}

/// K1 K2: as a Helm chart it is the same, but for what charts add; and values change what they say alone.
#[test]
fn helm_takes_the_manifest_as_its_source() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let run = |more: &[&str]| {
        Command::new(control_plane::helm().unwrap())
            .args([
                "template",
                "mine",
                deploy.to_str().unwrap(),
                "--kube-version=1.34.2",
            ])
            .args(more)
            .output()
            .unwrap()
    };
    let rendered = |more: &[&str]| {
        let output = run(more);
        assert!(output.status.success(), "{output:?}");
        let mut found = documents(
            String::from_utf8(output.stdout)
                .unwrap()
                .trim_start_matches("---\n"),
        );
        for object in found.values_mut() {
            let labels = object["metadata"]["labels"].as_object_mut().unwrap();
            for label in ["instance", "managed-by"] {
                assert!(labels.remove(&format!("app.kubernetes.io/{label}")).is_some());
            }
        }
        found
    };
    let checksum = |objects: &mut BTreeMap<String, Value>| {
        let template = &mut objects.get_mut("DaemonSet/sluice").unwrap()["spec"]["template"]["metadata"];
        let annotations = template.as_object_mut().unwrap().remove("annotations").unwrap();
        annotations["checksum/config"].to_string()
    };
    let mut wanted = documents(include_str!("../../deploy/sluice.yaml"));
    for object in wanted.values_mut() {
        object["metadata"]["labels"] = json!({ "app.kubernetes.io/name": "sluice" });
        if let Some(text) = object["data"]["config.yaml"].as_str() {
            object["data"] = json!({ "config.yaml": text.trim_end() });
        }
    }
    wanted.values_mut().for_each(without_nulls);
    let mut plain = rendered(&["--namespace=kube-system"]);
    let before = checksum(&mut plain);
    assert_eq!(plain, wanted);

    let values = json!({
        "image": { "tag": "0.2.0", "pullPolicy": "Always" },
        "config": { "proxy": { "mode": "nftables" }, "network": { "mtu": 1400 } },
        "resources": { "limits": { "memory": "200Mi" } },
        "nodeSelector": { "role": "edge" },
        "podLabels": { "team": "net", "app.kubernetes.io/name": "not this" },
    });
    let sets: Vec<String> = values
        .as_object()
        .unwrap()
        .iter()
        .map(|(key, value)| format!("--set-json={key}={value}"))
        .collect();
    let more: Vec<&str> = std::iter::once("--namespace=net")
        .chain(sets.iter().map(String::as_str))
        .collect();
    let mut changed = rendered(&more);
    assert_ne!(
        checksum(&mut changed),
        before,
        "another configuration wants other pods"
    );
    for (key, object) in &mut wanted {
        if object["metadata"].get("namespace").is_some() {
            object["metadata"]["namespace"] = "net".into();
        }
        match key.as_str() {
            "ClusterRoleBinding/sluice" => object["subjects"][0]["namespace"] = "net".into(),
            "ConfigMap/sluice" => {
                let text = changed[key]["data"]["config.yaml"].as_str().unwrap();
                let written: Value = serde_saphyr::from_str(text).unwrap();
                let mut config: Value =
                    serde_saphyr::from_str(object["data"]["config.yaml"].as_str().unwrap()).unwrap();
                config["proxy"]["mode"] = "nftables".into();
                config["network"] = json!({ "mtu": 1400 });
                assert_eq!(written, config);
                object["data"]["config.yaml"] = text.into();
            }
            "DaemonSet/sluice" => {
                let template = &mut object["spec"]["template"];
                template["metadata"]["labels"]["team"] = "net".into();
                let pod = &mut template["spec"];
                pod["nodeSelector"] = values["nodeSelector"].clone();
                pod["containers"][0]["resources"] = values["resources"].clone();
                for place in ["/initContainers/0", "/containers/0"] {
                    let container = pod.pointer_mut(place).unwrap();
                    container["image"] = "localhost/sluice:0.2.0".into();
                    container["imagePullPolicy"] = "Always".into();
                }
            }
            _ => {}
        }
    }
    assert_eq!(changed, wanted);

    let refused = run(&["--set=images.tag=0.2.0"]);
    assert!(!refused.status.success(), "a value that there is not is a slip");
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("images"),
        "{refused:?}"
    );
}

/// Looking for a key makes it, as null.
fn without_nulls(object: &mut Value) {
    if let Some(map) = object.as_object_mut() {
        map.retain(|_, value| !value.is_null());
    }
}

/// The objects of a stream of documents by kind and name.
fn documents(text: &str) -> BTreeMap<String, Value> {
    let parsed = text.split("---\n").map(|document| {
        let object: Value = serde_saphyr::from_str(document).expect("a document is YAML");
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let key = format!("{}/{}", word(&object["kind"]), word(&object["metadata"]["name"]));
        (key, object)
    });
    parsed.collect()
}
