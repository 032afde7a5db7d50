// Package kubernetes builds what deploy/kubernetes means, by Helm's and by kustomize's own
// packages, without a cluster. It is a module of its own: Helm is large.
package kubernetes

import (
	"bytes"
	"maps"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

// Kustomize is `kubectl kustomize DIR`.
func Kustomize(dir string) ([]byte, error) {
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		return nil, err
	}
	return built.AsYaml()
}

// Chart is `helm template demarc DIR --namespace demarc` with values.
func Chart(dir, values string) ([]byte, error) {
	chart, err := loader.Load(dir)
	if err != nil {
		return nil, err
	}
	var set map[string]any
	if err := yaml.Unmarshal([]byte(values), &set); err != nil {
		return nil, err
	}
	all, err := util.ToRenderValues(chart, set, common.ReleaseOptions{Name: "demarc", Namespace: "demarc", IsInstall: true}, common.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	files, err := engine.Engine{Strict: true}.Render(chart, all)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if strings.HasSuffix(name, ".yaml") {
			b.WriteString("\n---\n" + files[name])
		}
	}
	return b.Bytes(), nil
}
