package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/demarc/demarc/policy"
	"github.com/demarc/demarc/policy/kubernetes"
)

// newPolicyImportCommand groups what makes policies of other systems' policies.
func newPolicyImportCommand(env *environment) *cobra.Command {
	return group("import", "Make a policy of what another system declares", newPolicyImportKubernetesCommand(env))
}

type policyImportOptions struct {
	files     []string
	inventory string
	output    string
	version   uint64 // 0 = beyond the output's, or the time
	strict    bool
	kubernetes.Options
}

func newPolicyImportKubernetesCommand(env *environment) *cobra.Command {
	var o policyImportOptions
	var grouping string
	cmd := &cobra.Command{
		Use:   "kubernetes --inventory FILE [FILE...] -o POLICY",
		Short: "Turn NetworkPolicy and ClusterNetworkPolicy into a policy for the pods of an inventory",
		Long: "Import reads NetworkPolicy (networking.k8s.io/v1) and ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2) objects,\n" +
			"YAML or JSON, lists of them, or directories of such files, and writes the policy that means the same for the pods of the\n" +
			"inventory. Import again when objects, pods or labels change; pods keep their identities.\n\n" +
			"What a policy cannot say is refused by it and reported on standard error with its place. The exit status is then 0, or\n" +
			"with --strict 1, and nothing is written. It is 1 for an object that Kubernetes would not take, or of another kind.",
		Example: "  kubectl get networkpolicies,clusternetworkpolicies -A -o yaml > objects.yaml\n" +
			"  demarc policy import kubernetes --inventory inventory.yaml objects.yaml -o policy.yaml",
		Args: cobra.ArbitraryArgs,
		RunE: func(_ *cobra.Command, args []string) error {
			o.files, o.Group = args, kubernetes.Grouping(grouping)
			return policyImportRun(env, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.inventory, "inventory", "", "`file` that names the pods, their labels and addresses")
	f.StringVarP(&o.output, "output", "o", "", "file to write the policy to; - is standard output")
	f.StringVar(&o.Name, "name", "kubernetes", "name of the policy")
	f.Uint64Var(&o.version, "version", 0, "version of the policy (default: one more than the output has, and at least the time in milliseconds)")
	f.StringVar(&o.TrustDomain, "trust-domain", "cluster.local", "SPIFFE trust domain of the pods")
	f.StringVar(&o.NAT, "nat", "none", "none, or destination where connections go to service addresses that a host rewrites")
	f.StringVar(&grouping, "identity", string(kubernetes.Fitting), "who has an identity: pod, replica (pods of one kind share it), or auto (pod as long as that fits)")
	f.BoolVar(&o.strict, "strict", false, "fail, and write nothing, if there is something that a policy cannot say")
	return cmd
}

func policyImportRun(env *environment, o policyImportOptions) error {
	switch {
	case o.inventory == "":
		return usagef("policy import kubernetes: name the pods with --inventory FILE")
	case o.output == "":
		return usagef("policy import kubernetes: name the policy with -o FILE")
	case o.NAT != "none" && o.NAT != "destination":
		return usagef("--nat %q is neither none nor destination", o.NAT)
	case o.Group != kubernetes.ByPod && o.Group != kubernetes.ByReplica && o.Group != kubernetes.Fitting:
		return usagef("--identity %q is none of pod, replica and auto", o.Group)
	}
	inv, err := loadInventory(o.inventory)
	if err != nil {
		return err
	}
	objects, err := readObjects(env, o.files)
	if err != nil {
		return err
	}
	before, err := imported(o.output)
	if err != nil {
		return err
	}
	o.Version = o.version
	if o.Version == 0 && before != nil {
		o.Version = before.version
	}
	o.Version = max(o.Version, 1)
	result, err := kubernetes.Import(inv, objects, o.Options)
	if err != nil {
		return err
	}
	for _, p := range result.Reported {
		fmt.Fprintln(env.Stderr, p)
	}
	if o.strict && len(result.Reported) > 0 {
		return fmt.Errorf("policy import kubernetes: a policy cannot say %s; nothing was written", plural(len(result.Reported), "thing"))
	}
	if o.version == 0 {
		if before != nil && bytes.Equal(before.source, result.Source) {
			fmt.Fprintf(env.Stderr, "%s version %d: nothing changed\n", o.Name, o.Version)
			return nil
		}
		// Hosts take a newer version only, wherever the older one was written to.
		o.Version = uint64(max(time.Now().UnixMilli(), 1))
		if before != nil {
			o.Version = max(o.Version, before.version+1)
		}
		if result, err = kubernetes.Import(inv, objects, o.Options); err != nil {
			return err
		}
	}
	if o.output == "-" {
		_, err = env.Stdout.Write(result.Source)
		return err
	}
	if err := replaceFile(o.output, result.Source, 0o644); err != nil {
		return err
	}
	_, err = fmt.Fprintf(env.Stdout, "%s version %d: wrote %s: %s, %s, %s\n", o.Name, o.Version, o.output, plural(result.Pods, "pod"),
		plural(len(result.Policy.Workloads), "workload"), plural(len(result.Policy.Crossings), "crossing"))
	return err
}

// earlier is what an import wrote before.
type earlier struct {
	source  []byte
	version uint64
}

var versionLine = regexp.MustCompile(`(?m)^metadata: \{name: \S+, version: ([0-9]+)\}$`)

// imported reads the policy that stands where the new one goes; nil if there is none.
func imported(output string) (*earlier, error) {
	if output == "-" {
		return nil, nil
	}
	src, err := policy.ReadFile(output)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	found := versionLine.FindSubmatch(src)
	if found == nil {
		return nil, hintError{fmt.Errorf("%s is not a policy that an import wrote", output), "name another file with -o, or remove it"}
	}
	version, err := strconv.ParseUint(string(found[1]), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("%s: version: %w", output, err)
	}
	return &earlier{src, version}, nil
}

// readObjects reads files and the files of directories.
func readObjects(env *environment, paths []string) (*kubernetes.Objects, error) {
	objects := &kubernetes.Objects{}
	var problems kubernetes.Problems
	read := func(name string, r io.Reader) error {
		src, err := io.ReadAll(io.LimitReader(r, kubernetes.MaxSource+1))
		if err != nil {
			return fmt.Errorf("read %s: %w", name, err)
		}
		err = objects.Read(name, src)
		var some kubernetes.Problems
		if errors.As(err, &some) {
			problems = append(problems, some...)
			return nil
		}
		return err
	}
	file := func(name string) error {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		return read(name, f)
	}
	for _, path := range paths {
		info, err := os.Stat(path)
		switch {
		case path == "-":
			err = read(stdinName, env.Stdin)
		case err != nil:
		case !info.IsDir():
			err = file(path)
		default:
			var names []string
			for _, pattern := range [...]string{"*.yaml", "*.yml", "*.json"} {
				some, _ := filepath.Glob(filepath.Join(path, pattern)) // fails for bad patterns only
				names = append(names, some...)
			}
			for _, name := range names {
				if err = file(name); err != nil {
					break
				}
			}
		}
		if err != nil {
			return nil, err
		}
	}
	if len(problems) > 0 {
		return nil, problems
	}
	return objects, nil
}
