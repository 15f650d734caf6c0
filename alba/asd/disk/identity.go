package disk

import (
	"encoding/json"
	"fmt"
	"io"
	"path"

	"scoria/alba/asd"
	"scoria/alba/vfs"

	"github.com/google/uuid"
)

// identityFormat is the version of the layout of an ASD's directory.
const identityFormat = 1

// identity is the file of this name in an ASD's directory, as JSON. It is for
// people and for the check against a disk that is mounted in the wrong place; the
// key-value store has the id as well.
type identity struct {
	What   string `json:"what"` // identityWhat
	Format int    `json:"format"`
	ID     string `json:"id"`
}

const identityWhat = "Scoria ASD"

// maxIdentityBytes bounds what is read of the file.
const maxIdentityBytes = 4096

// readIdentity returns the id; fs.ErrNotExist if there is no such file.
func readIdentity(fsys vfs.FS, dir string) (uuid.UUID, error) {
	name := path.Join(dir, "identity")
	f, err := fsys.Open(name, vfs.ReadOnly)
	if err != nil {
		return uuid.Nil, err
	}
	defer f.Close()
	b := make([]byte, maxIdentityBytes)
	n, err := f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		return uuid.Nil, err
	}
	return decodeIdentity(name, b[:n])
}

func decodeIdentity(name string, b []byte) (uuid.UUID, error) {
	var i identity
	if err := json.Unmarshal(b, &i); err != nil {
		return uuid.Nil, fmt.Errorf("%s: %w", name, err)
	}
	if i.What != identityWhat || i.Format != identityFormat {
		return uuid.Nil, fmt.Errorf("%w: %s says %q of format %d, this program knows %q of format %d", asd.ErrWrongASD, name, i.What, i.Format, identityWhat, identityFormat)
	}
	id, err := uuid.Parse(i.ID)
	if err != nil {
		return uuid.Nil, fmt.Errorf("%s: id: %w", name, err)
	}
	return id, nil
}

func encodeIdentity(id uuid.UUID) ([]byte, error) {
	b, err := json.MarshalIndent(identity{What: identityWhat, Format: identityFormat, ID: id.String()}, "", "  ")
	return append(b, '\n'), err
}

// writeIdentity makes the file, whole or not at all.
func writeIdentity(fsys vfs.FS, dir string, id uuid.UUID) error {
	b, err := encodeIdentity(id)
	if err != nil {
		return err
	}
	return replaceFile(fsys, dir, "identity", b)
}
