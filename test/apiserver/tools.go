//go:build tools

// Package apiserver names the commands that `make test-kubernetes` builds.
package apiserver

import (
	_ "go.etcd.io/etcd/server/v3"
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
)
