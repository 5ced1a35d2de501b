//! Container ids in the text of `/proc/PID/cgroup`. Pure; reading the file is `lookup`'s.

/// What `/proc/PID/cgroup` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Cgroups<'a> {
    /// Path in the cgroup v2 hierarchy.
    pub unified_path: Option<&'a str>,
    /// Id of the innermost container, by the v2 path.
    pub unified: Option<&'a str>,
    /// The same by the first v1 hierarchy that shows one.
    pub legacy: Option<&'a str>,
    /// The host has v1 hierarchies too, which may tell containers apart where the v2 path does not.
    pub has_legacy: bool,
}

impl<'a> Cgroups<'a> {
    /// Takes any text; what is no line of the kernel's is passed over.
    pub(super) fn parse(text: &'a str) -> Self {
        let mut cgroups = Self::default();
        for line in text.lines() {
            let mut fields = line.splitn(3, ':');
            let (Some(hierarchy), Some(_controllers), Some(path)) =
                (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            // `proc_cgroup_show` marks a removed cgroup so.
            let path = path.strip_suffix(" (deleted)").unwrap_or(path);
            if hierarchy == "0" {
                cgroups.unified_path = Some(path);
                cgroups.unified = innermost(path);
            } else {
                cgroups.has_legacy = true;
                cgroups.legacy = cgroups.legacy.or_else(|| innermost(path));
            }
        }
        cgroups
    }

    pub(super) fn container(&self) -> Option<&'a str> {
        self.unified.or(self.legacy)
    }
}

/// What runs inside a container may make cgroups below its own, and run containers there: the last id counts.
fn innermost(path: &str) -> Option<&str> {
    path.rsplit('/').find_map(id_of)
}

/// The id in one part of a path: bare (the cgroupfs driver), or as `docker-….scope`, `cri-containerd-….scope`,
/// `crio-….scope`, `libpod-….scope` (the systemd driver), or after a colon (`….slice:cri-containerd:…`).
fn id_of(component: &str) -> Option<&str> {
    /// Docker's, containerd's through CRI or nerdctl, CRI-O's and Podman's ids are 32 random bytes in hex;
    /// other names (systemd-nspawn, LXC, `ctr run`) are names, not ids.
    const ID_LEN: usize = 64;

    let component = component.strip_suffix(".scope").unwrap_or(component);
    let (prefix, id) = component.split_at_checked(component.len().checked_sub(ID_LEN)?)?;
    let is_id = id
        .bytes()
        .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let separated = prefix.is_empty() || prefix.ends_with(['-', ':']);
    // conmon watches a container of Podman or CRI-O from outside.
    (is_id && separated && !prefix.ends_with("conmon-")).then_some(id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Cgroups, innermost};

    const ID: &str = "4f797c539e6c745de61a93ca3ff892358ecbcaccd8414d5db545c38428142970";
    const INNER: &str = "9ec39b91f3d70e1beff50a308f77067065ea6be0d91a3378375056cd4422cf3d";

    #[test]
    fn paths_of_each_runtime_name_their_container() {
        for path in [
            "/docker/ID",
            "/system.slice/docker-ID.scope",
            "/docker/ID/system.slice/nginx.service",
            "/system.slice/docker-ID.scope/init.scope",
            // Docker in Docker.
            "/docker/INNER/docker/ID",
            // Seen from a cgroup namespace.
            "/../../docker-ID.scope",
            "/kubepods/burstable/pod1d6c8a5e-04a6-4bd7-a9d5-0a42f0f1b2cb/ID",
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1d6c8a5e_04a6_4bd7_a9d5_0a42f0f1b2cb.slice/cri-containerd-ID.scope",
            "/kubepods.slice/kubepods-pod1d6c8a5e_04a6_4bd7_a9d5_0a42f0f1b2cb.slice/crio-ID.scope/container",
            "/system.slice/containerd.service/kubepods-burstable-pod1d6c8a5e_04a6_4bd7_a9d5_0a42f0f1b2cb.slice:cri-containerd:ID",
            "/system.slice/nerdctl-ID.scope",
            "/machine.slice/libpod-ID.scope",
            "/machine.slice/libpod-ID.scope/container",
            "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID.scope",
            "/user.slice/user-1000.slice/user@1000.service/user.slice/user-libpod_pod_INNER.slice/libpod-ID.scope",
            "/system.slice/web.service/libpod-payload-ID",
            "/libpod_parent/libpod-ID",
            "/kubelet/kubepods/besteffort/podINNER/ID",
            "/ecs/c9a7bb4d-2b4c-4ac2-a1bd-2a44f4a1ae0a/ID",
        ] {
            let path = path.replace("INNER", INNER).replace("ID", ID);
            assert_eq!(innermost(&path), Some(ID), "{path}");
        }
    }

    #[test]
    fn other_paths_name_none() {
        for path in [
            "/",
            "",
            "/init.scope",
            "/system.slice/sshd.service",
            "/user.slice/user-1000.slice/session-3.scope",
            "/machine.slice/systemd-nspawn@deb.service/payload",
            "/machine.slice/machine-deb.scope",
            "/lxc.payload.web/system.slice/nginx.service",
            "/machine.slice/libpod-conmon-ID.scope",
            "/system.slice/crio-conmon-ID.scope",
            "/docker/0ID",
            "/docker/IDf",
            "/docker-IDx.scope",
            "/kubepods/burstable/pod1d6c8a5e-04a6-4bd7-a9d5-0a42f0f1b2cb",
            "/docker/4F797C539E6C745DE61A93CA3FF892358ECBCACCD8414D5DB545C38428142970",
        ] {
            let path = path.replace("ID", ID);
            assert_eq!(innermost(&path), None, "{path}");
        }
    }

    #[test]
    fn both_cgroup_versions_are_read() {
        let pure = format!("0::/system.slice/docker-{ID}.scope\n");
        assert_eq!(
            Cgroups::parse(&pure),
            Cgroups {
                unified_path: Some(&pure[3..pure.len() - 1]),
                unified: Some(ID),
                legacy: None,
                has_legacy: false,
            }
        );

        // Docker with the cgroupfs driver on a hybrid host: every container has the same v2 path.
        let hybrid = format!(
            "12:pids:/docker/{ID}\n5:cpu,cpuacct:/docker/{ID}\n1:name=systemd:/docker/{ID}\n\
             0::/system.slice/containerd.service\n"
        );
        let cgroups = Cgroups::parse(&hybrid);
        assert_eq!(cgroups.container(), Some(ID));
        assert_eq!(cgroups.unified, None);
        assert!(cgroups.has_legacy);

        let none = "11:memory:/user.slice\n1:name=systemd:/user.slice\n";
        assert_eq!(Cgroups::parse(none).container(), None);
    }

    #[test]
    fn a_removed_cgroup_still_names_its_container() {
        let text = format!("0::/docker/{ID} (deleted)\n");
        let cgroups = Cgroups::parse(&text);
        assert_eq!(cgroups.container(), Some(ID));
        assert_eq!(cgroups.unified_path, Some(format!("/docker/{ID}").as_str()));
    }

    proptest! {
        #[test]
        fn any_text_is_taken_and_only_ids_come_out(text in "([0-9]{0,2}:?[a-f0-9/:.\\-\u{e9}]{0,140}\n?){0,4}") {
            if let Some(id) = Cgroups::parse(&text).container() {
                prop_assert_eq!(id.len(), 64);
                prop_assert!(id.bytes().all(|byte| byte.is_ascii_hexdigit()));
            }
        }
    }
}
