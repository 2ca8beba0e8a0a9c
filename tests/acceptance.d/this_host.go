// Stands in for the file of containerd's upgrade suite that downloads releases: the previous one is
// in a folder, and this host's registry and network plugins are told to each containerd.
package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

var configOfThisHost = os.Getenv("ACCEPTANCE_CONFIG")

func downloadPreviousLatestReleaseBinary(t *testing.T, version, targetDir string) {
	if version != os.Getenv("ACCEPTANCE_PREVIOUS") {
		t.Skipf("containerd %s is not to be had", version)
	}
	from := os.Getenv("ACCEPTANCE_PREVIOUS_PROGRAMS")
	if out, err := exec.Command("cp", "-rL", from, filepath.Join(targetDir, "bin")).CombinedOutput(); err != nil {
		t.Fatalf("copy of %s: %v: %s", from, err, out)
	}
}

func downloadReleaseBinary(t *testing.T, _ string, version string) {
	t.Skipf("containerd %s is not to be had", version)
}
