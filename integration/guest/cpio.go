package guest

import (
	"fmt"
	"io"
	"path"
	"sort"
	"strings"
)

// archive collects the files of an initramfs and writes them in the "newc"
// format of cpio (Linux, Documentation/driver-api/early-userspace/buffer-format.rst):
// per entry a header of 6 + 13 × 8 hexadecimal digits, the name with a final
// zero, the data; header plus name and data each padded to 4 bytes; the entry
// TRAILER!!! ends it. Everything belongs to root and dates from the epoch, so
// that equal input gives equal bytes.
type archive struct {
	files map[string]entry
}

type entry struct {
	mode uint32
	data []byte // contents, or a symbolic link's target
}

// File types of the mode field.
const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeLink = 0o120000
)

func newArchive() *archive { return &archive{files: make(map[string]entry)} }

// add puts a file at an absolute path; missing parents become directories.
func (a *archive) add(name string, mode uint32, data []byte) {
	name = strings.TrimPrefix(path.Clean(name), "/")
	for d := path.Dir(name); d != "."; d = path.Dir(d) {
		if _, ok := a.files[d]; ok {
			break
		}
		a.files[d] = entry{mode: modeDir | 0o755}
	}
	a.files[name] = entry{mode: mode, data: data}
}

func (a *archive) file(name string, perm uint32, data []byte) { a.add(name, modeFile|perm, data) }
func (a *archive) dir(name string)                            { a.add(name, modeDir|0o755, nil) }
func (a *archive) link(name, target string)                   { a.add(name, modeLink|0o777, []byte(target)) }

// writeTo writes the whole archive, parents before children.
func (a *archive) writeTo(w io.Writer) error {
	names := make([]string, 0, len(a.files))
	for n := range a.files {
		names = append(names, n)
	}
	sort.Strings(names)
	for i, n := range names {
		if err := writeEntry(w, i+1, n, a.files[n]); err != nil {
			return err
		}
	}
	return writeEntry(w, 0, "TRAILER!!!", entry{})
}

func writeEntry(w io.Writer, inode int, name string, e entry) error {
	nlink := 1
	if e.mode&modeDir != 0 && e.mode&modeFile != modeFile {
		nlink = 2
	}
	head := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		inode, e.mode, 0, 0, nlink, 0, len(e.data), 0, 0, 0, 0, len(name)+1, 0, name)
	if _, err := io.WriteString(w, head+padding(len(head))); err != nil {
		return err
	}
	if _, err := w.Write(e.data); err != nil {
		return err
	}
	_, err := io.WriteString(w, padding(len(e.data)))
	return err
}

func padding(n int) string { return "\x00\x00\x00"[:(4-n%4)%4] }
