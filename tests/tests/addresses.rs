//! Pods' addresses as the operator's configuration has them.

use std::net::IpAddr;

use serde_json::{Value, json};
use sluice_lab::demo::restart::kill_and_wait;
use sluice_lab::pods::Wanted;
use sluice_lab::{Lab, Options};

/// I5 I3 N1
#[test]
fn reserved_addresses_go_to_no_pod_and_are_no_part_of_the_pool() {
    let lab = Lab::up(Options {
        nodes: 1,
        ..Options::default()
    })
    .unwrap();
    let before = lab.pod_add("node1", "before", &[], &[]).unwrap();
    let place = lab.node("node1");
    place
        .sh("echo 'ipam: { reserved: [10.244.1.0/25, 10.244.1.200, \"fd00:244:0:1::/65\"] }' >> /etc/sluice/config.yaml")
        .unwrap();
    kill_and_wait(&lab, "node1").unwrap();
    let after = lab.pod_add("node1", "after", &[], &[]).unwrap();
    let expected: [IpAddr; 2] =
        ["10.244.1.128", "fd00:244:0:1:8000::"].map(|address| address.parse().unwrap());
    assert_eq!(after.addresses, expected);
    // The pod from before keeps its address, and all reach each other.
    sluice_tests::everybody_reaches_everybody(&lab, &[before, after]).unwrap();

    let wish = json!({ "ips": ["10.244.1.200/32"] });
    let refused = lab.pod_add_as(&Wanted {
        name: "asking".to_owned(),
        node: "node1".to_owned(),
        runtime_config: wish.as_object().unwrap().clone(),
        ..Wanted::default()
    });
    let said = format!("{:#}", refused.unwrap_err());
    assert!(
        said.contains("10.244.1.200/32 is reserved by ipam.reserved"),
        "{said}"
    );

    let status = lab.ctl_json("node1", &["status"]).unwrap();
    let pools = status["pools"].as_array().unwrap();
    let v4 = pools.iter().find(|pool| pool["cidr"] == "10.244.1.0/24").unwrap();
    // .128 to .254, without .200; and of those one is held.
    assert_eq!(
        (&v4["size"], &v4["held"]),
        (&Value::from(126), &Value::from(1)),
        "{v4}"
    );
}
