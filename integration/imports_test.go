package integration

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"scoria/integration/bed"
)

// rule forbids imports in the packages under some folders. Patterns are import
// paths; "/..." at the end takes in what is below.
type rule struct {
	in     []string // packages the rule is for
	except []string // but not these
	forbid []string
	allow  []string // exceptions to forbid
	tests  bool     // test files too
	reason string
}

var rules = []rule{
	{
		in:     []string{"scoria/driver/block"},
		forbid: []string{"scoria/..."},
		reason: "block is the seam that front ends and drivers share; what it imported, all of them would",
	},
	{
		in:     []string{"scoria/vhost/...", "scoria/shm/...", "scoria/driver/nbd/..."},
		forbid: []string{"scoria/..."},
		allow:  []string{"scoria/driver/block/...", "scoria/vhost/...", "scoria/shm/...", "scoria/driver/nbd/..."},
		tests:  true,
		reason: "front ends know the disk only as block.Device, so that any device serves any front end and the driver can change",
	},
	{
		in:     []string{"scoria/driver/...", "scoria/alba/...", "scoria/shm/mem"},
		except: []string{"scoria/driver/host/...", "scoria/driver/nbd/..."},
		forbid: []string{"scoria/vhost/...", "scoria/shm/...", "scoria/driver/nbd/...", "scoria/driver/host/..."},
		allow:  []string{"scoria/shm/mem"},
		reason: "the driver must not know by which front end a request came; cmd and driver/host join them",
	},
	{
		in:     []string{"scoria/alba/..."},
		forbid: []string{"scoria/driver/...", "scoria/vhost/...", "scoria/shm/..."},
		tests:  true,
		reason: "the object store serves the driver; were it to know the driver, neither could be used or tested alone",
	},
	{
		in:     []string{"scoria/driver/..."},
		except: []string{"scoria/driver/host/...", "scoria/driver/control/..."},
		forbid: []string{"scoria/alba/..."},
		allow:  []string{"scoria/alba/vfs"},
		reason: "the driver knows its store only as driver.Store; driver/host joins it with the object store, over which the driver's tests run too",
	},
	{
		in:     []string{"scoria/alba/asd", "scoria/alba/wire"},
		forbid: []string{"os", "net/...", "os/...", "syscall", "golang.org/x/sys/...", "github.com/cockroachdb/..."},
		reason: "what all of the object store knows of an ASD is types and bytes: neither a disk, nor a network, nor a key-value store",
	},
	{
		in:     []string{"scoria/..."},
		except: []string{"scoria/alba/asd/disk"},
		forbid: []string{"github.com/cockroachdb/..."},
		tests:  true,
		reason: "the key-value store is a matter of the ASD's engine alone, so that it can be replaced there",
	},
	{
		in:     []string{"scoria/vhost/wire", "scoria/vhost/virtq", "scoria/shm/wire", "scoria/shm/ring", "scoria/driver/tlog", "scoria/alba/erasure", "scoria/alba/place"},
		forbid: []string{"os", "net/...", "os/...", "syscall", "golang.org/x/sys/..."},
		reason: "pure: codecs over bytes, which is what lets fuzzing and property tests reach every state",
	},
	{
		in:     []string{"scoria/driver/schedule"},
		forbid: []string{"scoria/...", "os", "net/...", "os/...", "syscall", "golang.org/x/sys/..."},
		reason: "pure: decisions from the time, the rules and what there is, which is what lets tests run years of it",
	},
	{
		in:     []string{"scoria/driver/limit"},
		forbid: []string{"scoria/..."},
		allow:  []string{"scoria/driver/block"},
		reason: "limits hold for any block.Device, and the control API's clients, which know their settings, need not link the engine",
	},
	{
		in:     []string{"scoria/..."},
		except: []string{"scoria/cmd/...", "scoria/integration/..."},
		forbid: []string{"scoria/cmd/...", "scoria/integration/..."},
		tests:  true,
		reason: "programs and the test bed stand on the packages, not the other way round",
	},
	{
		in:     []string{"scoria/..."},
		except: []string{"scoria/cmd/...", "scoria/integration/...", "scoria/driver/control/..."},
		forbid: []string{"github.com/spf13/cobra"},
		tests:  true,
		reason: "command lines belong to the programs",
	},
	{
		in:     []string{"scoria/..."},
		except: []string{"scoria/cmd/scoria-virt/...", "scoria/libvirt/virt/..."},
		forbid: []string{"C"},
		tests:  true,
		reason: "cgo lives only in scoria-virt: all else must build, cross-compile and be killed without libvirt's C library",
	},
}

func (r *rule) concerns(pkg string) bool { return matches(r.in, pkg) && !matches(r.except, pkg) }

func (r *rule) forbids(imported string) bool {
	return matches(r.forbid, imported) && !matches(r.allow, imported)
}

func matches(patterns []string, name string) bool {
	for _, p := range patterns {
		if below, ok := strings.CutSuffix(p, "/..."); ok {
			if name == below || strings.HasPrefix(name, below+"/") {
				return true
			}
		} else if name == p {
			return true
		}
	}
	return false
}

// sourceFile is one Go file of the tree with its imports.
type sourceFile struct {
	name string // relative to the root, with slashes
	pkg  string // import path
	ast  *ast.File
}

func (f *sourceFile) test() bool { return strings.HasSuffix(f.name, "_test.go") }

func sourceFiles(t *testing.T) []sourceFile {
	t.Helper()
	root, err := bed.Root()
	if err != nil {
		t.Fatal(err)
	}
	var files []sourceFile
	err = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if n := d.Name(); p != root && (strings.HasPrefix(n, ".") || n == "testdata" || n == "bin") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), p, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		files = append(files, sourceFile{name: rel, pkg: path.Join("scoria", path.Dir(rel)), ast: f})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestImportRules holds the architecture: who may know whom, and why.
func TestImportRules(t *testing.T) {
	files := sourceFiles(t)
	used := make([]bool, len(rules))
	for _, f := range files {
		for i := range rules {
			r := &rules[i]
			if !r.concerns(f.pkg) {
				continue
			}
			used[i] = true
			if f.test() && !r.tests {
				continue
			}
			for _, spec := range f.ast.Imports {
				imported, err := strconv.Unquote(spec.Path.Value)
				if err != nil {
					t.Fatal(err)
				}
				if r.forbids(imported) {
					t.Errorf("%s imports %s: %s", f.name, imported, r.reason)
				}
			}
		}
	}
	for i, u := range used {
		if !u {
			t.Errorf("rule %v concerns no package: it is out of date", rules[i].in)
		}
	}
}

// diskCalls are the functions of package os that touch a disk.
var diskCalls = map[string]bool{
	"Open": true, "OpenFile": true, "Create": true, "CreateTemp": true, "WriteFile": true, "Truncate": true,
	"Remove": true, "RemoveAll": true, "Rename": true, "Link": true, "Symlink": true,
	"Mkdir": true, "MkdirAll": true, "MkdirTemp": true, "ReadDir": true, "Stat": true, "Lstat": true, "NewFile": true,
}

// TestDiskThroughVFS: the driver uses local disks through vfs.FS alone, so that the
// tests can crash them at every step. Reading a file of /proc is no such use.
func TestDiskThroughVFS(t *testing.T) {
	pkgs := []string{"scoria/driver", "scoria/driver/sco/...", "scoria/driver/tlog/...", "scoria/driver/lba/...", "scoria/driver/cache/...", "scoria/alba/asd/..."}
	root, err := bed.Root()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range sourceFiles(t) {
		if f.test() || !matches(pkgs, f.pkg) {
			continue
		}
		full, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, f.name), nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(full, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok {
				if x, ok := sel.X.(*ast.Ident); ok && x.Name == "os" && diskCalls[sel.Sel.Name] {
					t.Errorf("%s uses os.%s: go through vfs.FS, so that the tests can crash the disk at every step", f.name, sel.Sel.Name)
				}
			}
			return true
		})
	}
}

// TestUnsafeIsConfined: unsafe only in files named for it, where a reviewer looks.
func TestUnsafeIsConfined(t *testing.T) {
	for _, f := range sourceFiles(t) {
		confined := strings.HasSuffix(strings.TrimSuffix(f.name, "_test.go"), "_unsafe") || strings.HasSuffix(f.name, "_unsafe.go")
		for _, spec := range f.ast.Imports {
			if spec.Path.Value == `"unsafe"` && !confined {
				t.Errorf("%s imports unsafe: only files named *_unsafe.go may", f.name)
			}
		}
	}
}

// TestTopLevelFolders: the tree has the folders that were agreed on and no other.
func TestTopLevelFolders(t *testing.T) {
	allowed := map[string]bool{"cmd": true, "shm": true, "vhost": true, "driver": true, "alba": true, "libvirt": true, "integration": true, "packaging": true}
	for _, f := range sourceFiles(t) {
		if top, _, ok := strings.Cut(f.name, "/"); !ok || !allowed[top] {
			t.Errorf("%s: no Go file belongs there", f.name)
		}
	}
}
