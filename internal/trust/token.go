package trust

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// A token is text: "violin2-" and, in base64 for URLs without padding,
//
//	32 bytes  SHA-256 of the authority's certificate
//	 8 bytes  when it was made, in nanoseconds since 1970; big endian
//	 8 bytes  the second, since 1970, at which it expires; ditto
//	16 bytes  at random
//	 1 byte   0: for a host, 1: for an operator, 2: for an experimenter
//	 n bytes  the name of whom it is for, 0 to 63; a user's is not empty
//	32 bytes  HMAC-SHA-256 of all before, by a key of the authority's
//
// The server keeps nothing of it: what it has sealed, it knows again.
const (
	tokenPrefix = "violin2-"
	tokenNonce  = 16
	tokenFixed  = sha256.Size + 8 + 8 + tokenNonce + 1
	maxName     = 63
)

// tokenRoles are the roles that a token may be for, by their byte.
var tokenRoles = []Role{"", Operator, Experimenter}

// Bounds of a token's life.
const (
	MinTTL = time.Second
	MaxTTL = 30 * 24 * time.Hour
)

// ErrToken is wrapped in the error of a token that is not, or no longer, good.
var ErrToken = errors.New("the token is not good")

// Token is a token that a host joins or a user logs in with, taken apart. It is not
// known to be good.
type Token struct {
	Authority [sha256.Size]byte
	Made      time.Time
	Expires   time.Time
	Role      Role   // of a user; empty for a host's token
	Name      string // of the user, or of the host that alone may join with it; empty for any host
	nonce     [tokenNonce]byte
	seal      [sha256.Size]byte
}

// body is what the seal is of.
func (t *Token) body() []byte {
	b := append([]byte{}, t.Authority[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(t.Made.UnixNano()))
	b = binary.BigEndian.AppendUint64(b, uint64(t.Expires.Unix()))
	b = append(b, t.nonce[:]...)
	b = append(b, byte(slices.Index(tokenRoles, t.Role)))
	return append(b, t.Name...)
}

func (t *Token) String() string {
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(t.body(), t.seal[:]...))
}

// ParseToken reads what [Token.String] has written, and nothing else. After an error
// the token is nil.
func ParseToken(s string) (*Token, error) {
	text, ok := strings.CutPrefix(s, tokenPrefix)
	if !ok {
		return nil, fmt.Errorf("%w: it does not begin with %q, as those that `violin token create` of this version prints", ErrToken, tokenPrefix)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || strings.ContainsAny(text, "\r\n") { // which the decoder skips
		return nil, fmt.Errorf("%w: a part of it is missing or wrong", ErrToken)
	}
	n := len(b) - tokenFixed - sha256.Size
	if n < 0 || n > maxName {
		return nil, fmt.Errorf("%w: it is %d bytes, want %d to %d", ErrToken, len(b), tokenFixed+sha256.Size, tokenFixed+sha256.Size+maxName)
	}
	t := &Token{Name: string(b[tokenFixed : tokenFixed+n])}
	copy(t.Authority[:], b)
	made, seconds := binary.BigEndian.Uint64(b[sha256.Size:]), binary.BigEndian.Uint64(b[sha256.Size+8:])
	if made > math.MaxInt64 || seconds > 1<<40 {
		return nil, fmt.Errorf("%w: it would be made or expire in centuries", ErrToken)
	}
	t.Made, t.Expires = time.Unix(0, int64(made)), time.Unix(int64(seconds), 0)
	copy(t.nonce[:], b[sha256.Size+16:])
	copy(t.seal[:], b[tokenFixed+n:])
	role := int(b[tokenFixed-1])
	if role >= len(tokenRoles) {
		return nil, fmt.Errorf("%w: it is for a role that this violin does not know", ErrToken)
	}
	t.Role = tokenRoles[role]
	if t.Name != "" || t.Role != "" {
		if err := CheckName(t.Name); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrToken, err)
		}
	}
	return t, nil
}

// NewToken makes a token for a host, or for any if that is empty.
func (a *Authority) NewToken(host string, ttl time.Duration) (*Token, error) {
	if host != "" {
		if err := CheckName(host); err != nil {
			return nil, err
		}
	}
	return a.newToken("", host, ttl)
}

// NewUserToken makes a token for a user.
func (a *Authority) NewUserToken(u User, ttl time.Duration) (*Token, error) {
	if err := errors.Join(CheckName(u.Name), CheckRole(u.Role)); err != nil {
		return nil, err
	}
	return a.newToken(u.Role, u.Name, ttl)
}

func (a *Authority) newToken(role Role, name string, ttl time.Duration) (*Token, error) {
	if ttl < MinTTL || ttl > MaxTTL {
		return nil, fmt.Errorf("a token for %s: it may be good for %s to %s", ttl, MinTTL, MaxTTL)
	}
	now := time.Now()
	t := &Token{Authority: sha256.Sum256(a.cert.Raw), Made: now, Expires: now.Add(ttl).Truncate(time.Second), Role: role, Name: name}
	if _, err := rand.Read(t.nonce[:]); err != nil {
		return nil, err
	}
	copy(t.seal[:], a.seal(t))
	return t, nil
}

func (a *Authority) seal(t *Token) []byte {
	m := hmac.New(sha256.New, a.token)
	m.Write(t.body())
	return m.Sum(nil)
}

// checkToken refuses a token that is not good for a name, of which m is remembered.
func (a *Authority) checkToken(t *Token, name string, m *member, now time.Time) error {
	switch {
	case !hmac.Equal(t.seal[:], a.seal(t)):
		return fmt.Errorf("%w: this server has not made it", ErrToken)
	case now.After(t.Expires):
		return fmt.Errorf("%w: it expired at %s; `violin token create` makes another", ErrToken, t.Expires.UTC().Format(time.RFC3339))
	case t.Name != "" && t.Name != name:
		return fmt.Errorf("%w: it is for host %s, not for %s", ErrToken, t.Name, name)
	case !t.Made.After(m.Removed):
		return fmt.Errorf("%w: %s was put out after it was made; `violin token create` makes another", ErrToken, name)
	}
	return nil
}
