package systemd_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/demarc/demarc/test/netlab"
)

// TestExposure holds the units to what systemd's own judge says of them. What the
// core's unit allows and why is said in it.
func TestExposure(t *testing.T) {
	lab := netlab.New(t)
	h := newHost(t, lab)
	h.Boot()
	exposure := regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+)`)
	for unit, most := range map[string]float64{"demarc-agent.service": 1.5, "demarc-core.service": 4.2} {
		out := h.Run("systemd-analyze", "security", "--no-pager", "--offline=true", "/usr/lib/systemd/system/"+unit)
		found := exposure.FindStringSubmatch(out)
		if found == nil {
			t.Fatalf("%s: %s", unit, out)
		}
		if got, err := strconv.ParseFloat(found[1], 64); err != nil || got > most {
			t.Errorf("%s: exposure %s, at most %v:\n%s", unit, found[1], most, out)
		}
		if out, status := h.Try("systemd-analyze", "verify", "--man=no", "/usr/lib/systemd/system/"+unit); status != 0 || out != "" {
			t.Errorf("%s: %d\n%s", unit, status, out)
		}
	}
	// Each hardening that the judge misses is named in the unit, with its reason.
	for _, unit := range []string{"demarc-agent.service", "demarc-core.service"} {
		b, err := os.ReadFile(filepath.Join("../../deploy/systemd", unit))
		if err != nil {
			t.Fatal(err)
		}
		_, reasons, _ := strings.Cut(string(b), "# What a hardened unit usually has")
		out := h.Run("systemd-analyze", "security", "--no-pager", "--offline=true", "/usr/lib/systemd/system/"+unit)
		for _, m := range regexp.MustCompile(`(?m)^✗ ([A-Za-z]+)=`).FindAllStringSubmatch(out, -1) {
			switch option := m[1]; {
			case strings.Contains(reasons, option+"="):
			case option == "SystemCallFilter", option == "CapabilityBoundingSet", option == "RestrictAddressFamilies", option == "DeviceAllow":
				// Lists of what is needed, where they stand.
			default:
				t.Errorf("%s lacks %s and does not say why", unit, option)
			}
		}
	}
	// Presets, user and directories are taken as they are meant.
	h.Run("systemctl", "disable", "demarc-core", "demarc-agent")
	h.Run("systemctl", "preset", "demarc-core", "demarc-agent")
	if out := h.Run("systemctl", "is-enabled", "demarc-core", "demarc-agent"); out != "enabled\nenabled\n" {
		t.Errorf("after preset: %s", out)
	}
	if out := h.Run("id", "demarc"); !strings.Contains(out, "(demarc)") {
		t.Errorf("user: %s", out)
	}
	if out := h.Run("stat", "-c", "%a %U", "/sys/fs/bpf", "/var/lib/demarc", "/run/demarc", "/run/demarc-agent"); out != "700 root\n700 root\n755 root\n755 demarc\n" {
		t.Errorf("directories: %s", out)
	}
}
