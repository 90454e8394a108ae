//! `status` and `doctor`.

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, symlink},
        process::CommandExt,
    },
    path::PathBuf,
    process::{Command, Output},
    thread,
};

use nucnet_ctl::{
    AttachRequest, Container, Kind,
    kernel::{capability, netns},
    model::{EndpointId, NetworkName, publish::PublishSpec, record::NetworkWish},
    verbs::Removal,
};
use serde_json::Value;

use crate::lab::{Lab, ip, json, list, on_a_host, text};

impl Lab {
    pub(crate) fn attach(&self, id: &str, more: &str) -> PathBuf {
        let path = self.container(id);
        self.ok(&format!(
            "attach --netns {} --id {id} {more}",
            path.display()
        ));
        path
    }

    fn status(&self) -> Value {
        self.json("status --sample 0s")
    }

    /// What has drifted, with its remedies.
    pub(crate) fn drift(&self) -> Vec<(String, String)> {
        list(&self.status()["drift"])
            .iter()
            .map(|drift| (text(&drift["id"]), text(&drift["remedy"])))
            .collect()
    }
}

pub(crate) fn named<'a>(values: &'a Value, id: &str) -> &'a Value {
    list(values)
        .iter()
        .find(|value| value["id"] == id)
        .unwrap_or_else(|| panic!("no {id} in {values}"))
}

fn link_of(lab: &Lab, id: &str) -> String {
    text(&json(&lab.ok(&format!("inspect {id} -o json")))["host_ifname"])
}

#[test]
fn status_of_a_host_without_nucnet_says_so_and_leaves_nothing() {
    on_a_host(|lab| {
        let status = lab.status();
        assert_eq!(status["datapath"], Value::Null);
        assert_eq!(status["host"]["has_state"], false);
        assert_eq!(status["endpoints"], 0);
        assert_eq!(named(&status["uplinks"], "up0")["present"], false);
        assert_eq!(list(&status["drift"]).len(), 0);
        assert!(!lab.place.join("state").exists());
        assert!(!lab.place.join("bpf/nucnet").exists());
        assert!(lab.ok("status").contains("datapath   none"));
    });
}

#[test]
fn status_shows_what_an_attach_made() {
    on_a_host(|lab| {
        lab.attach("web", "-p 8080:80 --allow any:443/tcp");
        let status = lab.status();
        assert_eq!(status["datapath"], "ebpf");
        assert_eq!(status["object"]["current"], true);
        let uplink = named(&status["uplinks"], "up0");
        assert_eq!(uplink["present"], true);
        assert_eq!(uplink["serves"], true);
        let network = named(&status["networks"], "default");
        assert_eq!(network["present"], true);
        assert_eq!(network["endpoints"], 1);
        assert_eq!(status["endpoints"], 1);
        assert_eq!(named(&status["maps"], "endpoints")["entries"], 1);
        assert_eq!(named(&status["maps"], "addresses")["entries"], 2);
        assert!(named(&status["programs"], "from_endpoint")["machine_code_bytes"].is_u64());
        assert_eq!(list(&status["drift"]).len(), 0, "{}", status["drift"]);
        let text = lab.ok("status --sample 0s");
        assert!(text.contains("no drift"), "{text}");
    });
}

#[test]
fn programs_are_timed_while_packets_pass() {
    on_a_host(|lab| {
        let netns = lab.attach("web", "");
        let status = thread::scope(|scope| {
            let sampling = scope.spawn(|| json(&lab.ok("status -o json --sample 2s")));
            // Enough packets for a program to be seen, for as long as the sample may take.
            while !sampling.is_finished() {
                let ping = Command::new("nsenter")
                    .arg(format!("--net={}", netns.display()))
                    .args(["ping", "-c", "1", "-W", "1", "10.0.42.1"])
                    .output();
                assert!(ping.expect("ping").status.success());
            }
            sampling.join().expect("status")
        });
        let program = named(&status["programs"], "from_endpoint");
        assert!(program["runs"].as_u64().expect("runs") > 0, "{program}");
        assert!(program["ns_per_run"].as_f64().expect("time") > 0.0);
        assert_eq!(status["sampled_s"], 2.0);
    });
}

#[test]
fn drift_is_shown_with_what_mends_it() {
    on_a_host(|lab| {
        lab.attach("web", "-p 8080:80");
        lab.attach("db", "");
        let link = link_of(lab, "web");

        let filters = format!("filter del dev {link} ingress");
        let tc = Command::new("tc").args(filters.split(' ')).status();
        assert!(tc.expect("tc").success());
        let again = "attach it again: that repairs it";
        assert_eq!(lab.drift(), [("endpoint web".to_owned(), again.to_owned())]);

        ip(&format!("link del {link}"));
        assert_eq!(lab.drift(), [("endpoint web".to_owned(), again.to_owned())]);
        netns::remove_named(&lab.place.join("web")).expect("remove");
        assert_eq!(
            lab.drift(),
            [("endpoint web".to_owned(), "nucnet-ctl gc".to_owned())]
        );
        lab.ok("gc");
        assert_eq!(lab.drift(), []);

        fs::remove_file(lab.place.join("state/endpoints/db.json")).expect("record");
        let kinds: Vec<String> = lab.drift().into_iter().map(|(id, _)| id).collect();
        assert!(kinds.contains(&"map endpoints".to_owned()), "{kinds:?}");
        assert!(
            kinds.iter().any(|kind| kind.starts_with("interface nn")),
            "{kinds:?}"
        );
        let text = lab.ok("status --sample 0s");
        assert!(text.contains("remedy: nucnet-ctl gc"), "{text}");
    });
}

#[test]
fn an_interface_that_came_up_later_drifts_until_the_next_gc() {
    on_a_host(|lab| {
        lab.attach("web", "");
        ip("link add later type veth peer name distant");
        ip("link set later addrgenmode none");
        ip("link set later up");
        ip("address add 198.51.100.1/24 dev later");
        assert_eq!(
            lab.drift(),
            [("uplink later".to_owned(), "nucnet-ctl gc".to_owned())]
        );
        lab.ok("gc");
        assert_eq!(lab.drift(), []);
        ip("address del 198.51.100.1/24 dev later");
        assert_eq!(
            lab.drift(),
            [("interface later".to_owned(), "nucnet-ctl gc".to_owned())]
        );
    });
}

#[test]
fn a_bridge_that_lost_what_it_needs_is_mended_as_status_says() {
    on_a_host(|lab| {
        lab.attach("web", "");
        ip("address del 10.0.42.1/24 dev nucnet0");
        // With its address went the neighbours that were in its prefix.
        let drift = lab.drift();
        let bridge = drift.iter().find(|(id, _)| id == "network default");
        let remedy = &bridge.expect("drift of the network").1;
        assert!(remedy.starts_with("attach any endpoint to it"), "{remedy}");
        lab.attach("db", "");
        assert_eq!(lab.drift(), []);
    });
}

/// The findings of `doctor`, and its exit code.
pub(crate) fn findings(command: &mut Command) -> (Value, Option<i32>) {
    let output = command.output().expect("nucnet-ctl");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.is_empty(), "{output:?}");
    (json(&text), output.status.code())
}

#[test]
fn doctor_needs_no_state_and_leaves_nothing() {
    on_a_host(|lab| {
        let before = ip("link show");
        let (found, code) = findings(&mut lab.command("doctor -o json"));
        assert_eq!(code, Some(0), "{found}");
        assert_eq!(named(&found, "programs")["severity"], "ok");
        assert_eq!(named(&found, "capabilities")["severity"], "ok");
        assert_eq!(named(&found, "address-overlap")["severity"], "ok");
        assert!(
            list(&found)
                .iter()
                .all(|finding| (finding["severity"] == "ok") == finding["remedy"].is_null())
        );
        assert_eq!(ip("link show"), before);
        assert!(!lab.place.join("state").exists());
        assert!(!lab.place.join("bpf/nucnet").exists());
        let text = lab.ok("doctor");
        assert!(text.contains("ok      programs: "), "{text}");
    });
}

#[test]
fn doctor_fails_where_there_is_no_bpf_filesystem() {
    on_a_host(|lab| {
        let nowhere = lab.place.join("nowhere/nucnet");
        let (found, code) = findings(lab.command("doctor -o json").env("NUCNET_BPFFS", nowhere));
        assert_eq!(code, Some(5));
        let bpffs = named(&found, "bpffs");
        assert_eq!(bpffs["severity"], "fail");
        assert!(
            text(&bpffs["remedy"]).starts_with("mount -t bpf"),
            "{bpffs}"
        );
    });
}

#[test]
fn doctor_without_rights_says_what_it_could_not_look_at() {
    on_a_host(|lab| {
        // Where everybody may execute it.
        let program = lab.place.join("nucnet-ctl");
        fs::copy(env!("CARGO_BIN_EXE_nucnet-ctl"), &program).expect("copy");
        let privileged = lab.command("");
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&program)
            .args(["doctor", "-o", "json"]);
        command.envs(privileged.get_envs().filter_map(|(k, v)| Some((k, v?))));
        let (found, code) = findings(&mut command);
        assert_eq!(code, Some(5), "{found}");
        assert_eq!(named(&found, "capabilities")["severity"], "fail");
        for id in ["programs", "foreign-programs"] {
            assert_eq!(named(&found, id)["severity"], "unknown", "{id}");
        }
        assert_eq!(named(&found, "cgroup2")["severity"], "ok");
    });
}

#[test]
fn doctor_names_what_interferes() {
    on_a_host(|lab| {
        lab.attach("web", "-p 8080:80");
        let set = |sysctl: &str, value| {
            fs::write(format!("/proc/sys/net/{sysctl}"), value).expect(sysctl);
        };
        // With one uplink, it does not matter.
        ip("address add 198.51.100.1/24 dev up1");
        set("ipv4/conf/all/rp_filter", "1");
        ip("route add 10.0.42.0/25 via 192.0.2.7");
        let (found, code) = findings(&mut lab.command("doctor -o json"));
        assert_eq!(code, Some(0), "{found}");
        for id in ["rp-filter", "address-overlap"] {
            assert_eq!(named(&found, id)["severity"], "warn", "{id}");
        }
        // Nucnet's own programs are nobody else's.
        assert_eq!(
            named(&found, "foreign-programs")["severity"],
            "ok",
            "{found}"
        );
    });
}

#[test]
fn doctor_names_foreign_filters_on_uplinks() {
    on_a_host(|lab| {
        lab.attach("web", "");
        let tc = |arguments: &str| {
            let tc = Command::new("tc").args(arguments.split(' ')).output();
            tc.expect("tc").status.success()
        };
        assert!(tc("qdisc add dev up0 clsact"));
        if !tc("filter add dev up0 ingress protocol all matchall action pass")
            && !tc("filter add dev up0 ingress protocol ip u32 match u32 0 0")
        {
            eprintln!("skipped: this kernel has no filter but programs");
            return;
        }
        let (found, _) = findings(&mut lab.command("doctor -o json"));
        let finding = named(&found, "foreign-programs");
        assert_eq!(finding["severity"], "warn");
        assert!(text(&finding["text"]).contains("on up0"), "{finding}");
    });
}

#[test]
fn doctor_takes_no_programs_for_foreign_when_it_cannot_tell() {
    on_a_host(|lab| {
        lab.attach("web", "");
        let version = lab.options().bpffs.join("version");
        fs::remove_file(&version).expect("remove");
        symlink("abi-999:sha256-00", &version).expect("symlink");
        let (found, _) = findings(&mut lab.command("doctor -o json"));
        let finding = named(&found, "foreign-programs");
        assert_eq!(finding["severity"], "unknown", "{finding}");
        assert!(text(&finding["text"]).contains("999"), "{finding}");
    });
}

#[test]
fn doctor_names_ports_that_iptables_translates_as_well() {
    on_a_host(|lab| {
        lab.attach("web", "-p 8080-8090:80-90");
        let iptables = |arguments: &str| {
            let iptables = Command::new("iptables").args(arguments.split(' ')).output();
            iptables.is_ok_and(|output| output.status.success())
        };
        let rule =
            "-t nat -A PREROUTING -p tcp --dport 8085 -j DNAT --to-destination 172.17.0.2:80";
        if !iptables(rule) || !iptables("-P FORWARD DROP") {
            eprintln!("skipped: no iptables");
            return;
        }
        let (found, code) = findings(&mut lab.command("doctor -o json"));
        assert_eq!(code, Some(0));
        let finding = named(&found, "foreign-dnat");
        assert_eq!(finding["severity"], "warn");
        assert!(text(&finding["text"]).contains("8085/tcp"), "{finding}");
        let policy = named(&found, "forward-policy");
        assert_eq!(policy["severity"], "ok");
        assert!(
            text(&policy["text"]).contains("FORWARD (iptables-save)"),
            "{policy}"
        );
    });
}

#[test]
fn doctor_takes_nucnets_own_rules_for_nobody_elses() {
    on_a_host(|lab| {
        let container = lab.container("web");
        let attach = format!("attach --netns {} -p 8080:80", container.display());
        lab.ok(&format!("--datapath iptables {attach}"));
        let (found, code) = findings(&mut lab.command("doctor -o json"));
        assert_eq!(code, Some(0), "{found}");
        assert_eq!(named(&found, "foreign-dnat")["severity"], "ok", "{found}");
    });
}

/// The program with no other capabilities.
fn with_capabilities(lab: &Lab, set: &str, arguments: &str) -> Output {
    let plain = lab.command(arguments);
    let mut command = Command::new("setpriv");
    command
        .arg(format!("--bounding-set={set}"))
        .arg("--inh-caps=-all")
        .arg(plain.get_program())
        .args(plain.get_args())
        .envs(plain.get_envs().filter_map(|(k, v)| Some((k, v?))));
    command.output().expect("setpriv")
}

#[test]
fn verbs_that_change_things_name_the_missing_capability_first() {
    on_a_host(|lab| {
        let path = lab.place.join("web");
        netns::create_named(&path).expect("namespace");
        let attach = format!("attach --netns {} --id web", path.display());
        for verb in [
            attach.as_str(),
            "detach web",
            "publish web 80:80",
            "unpublish web 80:80",
            "network create blue",
            "network remove blue",
            "gc",
            "down",
        ] {
            for capability in ["net_admin", "sys_admin"] {
                let arguments = format!("{verb} -o json");
                let output = with_capabilities(lab, &format!("-{capability}"), &arguments);
                assert_eq!(output.status.code(), Some(5), "{verb}: {output:?}");
                let error = &json(&String::from_utf8_lossy(&output.stderr))["error"];
                let name = format!("CAP_{}", capability.to_uppercase());
                assert!(text(&error["message"]).contains(&name), "{verb}: {error}");
                assert!(text(&error["hint"]).contains(&name), "{verb}: {error}");
            }
        }
        assert!(!lab.place.join("state").exists());
        assert!(!lab.place.join("bpf/nucnet").exists());
    });
}

#[test]
fn the_needed_capabilities_are_enough() {
    on_a_host(|lab| {
        let set = capability::NEEDED
            .iter()
            .map(|c| format!(",+{}", c.name.trim_start_matches("CAP_").to_lowercase()))
            .collect::<String>();
        let set = format!("-all{set}");
        let path = lab.place.join("web");
        let netns = netns::create_named(&path).expect("namespace");
        let mut container = Command::new("nsenter")
            .arg(format!("--net={}", path.display()))
            .args(["sleep", "60"])
            .spawn()
            .expect("nsenter");
        let own = format!("/proc/{}/ns/net", container.id());
        while fs::metadata(&own).expect("process").ino() != netns.id().inode {
            thread::yield_now();
        }
        let attach = format!("attach --pid {} --id web -p 8080:80", container.id());
        for arguments in [
            attach.as_str(),
            "publish web 8081:81",
            "unpublish web 8080:80",
            "status --sample 10ms",
            "doctor",
            "gc",
            "detach web",
            "network create blue",
            "network remove blue",
            "down",
        ] {
            let output = with_capabilities(lab, &set, arguments);
            assert!(output.status.success(), "{arguments}: {output:?}");
        }
        container.kill().expect("kill");
        container.wait().expect("wait");
    });
}

#[test]
fn the_library_asks_for_capabilities_before_it_changes_anything() {
    on_a_host(|lab| {
        let netns = lab.container("web");
        let host = lab.host();
        let id: EndpointId = "web".parse().expect("id");
        let specs: Vec<PublishSpec> = vec!["80:80".parse().expect("spec")];
        let blue: NetworkName = "blue".parse().expect("name");
        let ids = [id.clone()];
        let call_all = || {
            [
                host.attach(&AttachRequest::new(Container::Netns(netns.clone())))
                    .map(drop),
                host.detach(&ids).map(drop),
                host.publish(&id, &specs).map(drop),
                host.unpublish(&id, &specs).map(drop),
                host.create_network(&blue, NetworkWish::default()).map(drop),
                host.remove_network(&blue),
                host.gc(Removal::Done).map(drop),
                host.down(),
            ]
        };
        let lacking = |name: &str| -> Vec<u32> {
            let others = capability::NEEDED.iter().filter(|c| c.name != name);
            others.map(|c| c.number).collect()
        };
        // Capabilities are a thread's; what they were does not come back to it.
        let outcomes = thread::scope(|scope| {
            let calls = scope.spawn(|| {
                capability::limit_to(&lacking("CAP_NET_ADMIN")).expect("fewer capabilities");
                call_all()
            });
            calls.join().expect("calls")
        });
        for (number, outcome) in outcomes.into_iter().enumerate() {
            let error = outcome.expect_err("not permitted");
            assert_eq!(error.kind(), Kind::Unsupported, "{number}: {error}");
            assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
        }
        assert!(!lab.place.join("state").exists());
    });
}

#[test]
fn whoever_calls_a_set_user_id_copy_gets_nothing_done() {
    on_a_host(|lab| {
        let copy = lab.place.join("copy");
        fs::copy(env!("CARGO_BIN_EXE_nucnet-ctl"), &copy).expect("copy");
        fs::set_permissions(&lab.place, fs::Permissions::from_mode(0o755)).expect("mode");
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o4755)).expect("mode");
        let before = lab.snapshot();
        let output = Command::new(&copy)
            .args(["network", "create", "red", "--state-dir"])
            .arg(lab.place.join("state"))
            .uid(65_534)
            .output()
            .expect("copy");
        assert_eq!(output.status.code(), Some(5), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("set-user-ID"));
        lab.assert_unchanged(&before, "afterwards");
    });
}

#[test]
fn capabilities_that_are_not_needed_are_given_up() {
    on_a_host(|lab| {
        lab.attach("web", "");
        let lock = fs::File::open(lab.place.join("state/lock")).expect("lock");
        lock.lock().expect("lock");
        let mut waiting = lab.command("detach web").spawn().expect("nucnet-ctl");
        let process = PathBuf::from(format!("/proc/{}", waiting.id()));
        let tasks = || fs::read_dir(process.join("task")).expect("tasks").count();
        while tasks() < 2 {
            assert_eq!(waiting.try_wait().expect("wait"), None);
            thread::yield_now();
        }
        let status = fs::read_to_string(process.join("status")).expect("status");
        drop(lock);
        assert!(waiting.wait().expect("wait").success());
        let set = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            u64::from_str_radix(line.expect(name).trim(), 16).expect("number")
        };
        let needed: u64 = capability::NEEDED.iter().map(|c| 1 << c.number).sum();
        // To bind low ports, for iptables-legacy, and to raise the limit of locked memory.
        let kept = needed | 1 << 10 | 1 << 13 | 1 << 24;
        for name in ["CapEff:", "CapPrm:", "CapBnd:"] {
            assert_eq!(set(name) & !kept, 0, "{name} {:x}", set(name));
            assert_eq!(set(name) & needed, needed, "{name} {:x}", set(name));
        }
    });
}

#[test]
fn a_sample_without_a_unit_is_bad_input() {
    on_a_host(|lab| {
        let Output { status, stderr, .. } = lab
            .command("status --sample 5 -o json")
            .output()
            .expect("nucnet-ctl");
        assert_eq!(status.code(), Some(2));
        let error = json(&String::from_utf8_lossy(&stderr));
        assert_eq!(error["error"]["kind"], "usage");
    });
}
