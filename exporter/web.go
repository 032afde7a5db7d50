package exporter

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/prometheus/exporter-toolkit/web"
	"go.yaml.in/yaml/v2"
)

// checkWeb reads a web configuration as it will be read at each connection. The file
// is that of Prometheus and its exporters: tls_server_config, basic_auth_users, ...
func checkWeb(file string) error {
	if err := web.Validate(file); err != nil {
		// A parser's errors take several lines.
		return fmt.Errorf("read web configuration %s: %s", file, strings.Join(strings.Fields(err.Error()), " "))
	}
	return nil
}

// WebDirectories are those that a web configuration and the files it names are in.
func WebDirectories(file string) ([]string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read web configuration: %w", err)
	}
	var c web.Config
	if err := yaml.Unmarshal(text, &c); err != nil {
		return nil, fmt.Errorf("read web configuration %s: %w", file, err)
	}
	dir := filepath.Dir(file)
	c.TLSConfig.SetDirectory(dir)
	dirs := []string{dir}
	for _, named := range []string{c.TLSConfig.TLSCertPath, c.TLSConfig.TLSKeyPath, c.TLSConfig.ClientCAs} {
		if named != "" {
			dirs = append(dirs, filepath.Dir(named))
		}
	}
	slices.Sort(dirs)
	return slices.Compact(dirs), nil
}
